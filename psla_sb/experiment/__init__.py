"""What a recipe's scripts do."""
