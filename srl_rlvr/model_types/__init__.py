"""The model types: what each is asked, in which form it answers, and how its expert's work is cut into tokens."""
