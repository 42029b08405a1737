"""What types have in common, by what their answers are: text, or an ordering of candidates."""
