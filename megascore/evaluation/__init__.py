"""What a smaller model lost: paired differences with their standard errors, as a table and as JSON."""
