"""Model families that can be brought here, and some taken back: a family is a file and an entry."""
