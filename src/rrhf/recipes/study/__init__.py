"""Results of many arms and seeds → what they say about the paper's claims, as a page."""
