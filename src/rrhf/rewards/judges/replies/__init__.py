"""A judge's reply → scores, or the reason why it is refused. A reader a format; none of them guesses."""
