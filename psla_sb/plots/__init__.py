"""Every picture of the toolkit."""
