"""Other people's rows: what a row of theirs becomes, a module a kind of data."""
