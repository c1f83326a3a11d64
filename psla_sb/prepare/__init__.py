"""Data sets as they are published -> annotations, copies and packs that training reads."""
