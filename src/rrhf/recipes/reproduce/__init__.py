"""Every system of the paper and its rivals as rows of one table: arms × seeds, shared by any number of processes."""
