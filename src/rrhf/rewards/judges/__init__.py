"""Language models as rewards: what they are asked, how their replies are read, and who asks them."""
