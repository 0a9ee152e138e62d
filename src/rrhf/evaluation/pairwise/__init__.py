"""Two systems' answers to the same questions, judged in pairs: who wins, how surely, and what the judge is worth."""
