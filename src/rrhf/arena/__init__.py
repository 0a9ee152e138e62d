"""Policy → people: the page on which raters compare the responses of several systems, and what their votes say."""
