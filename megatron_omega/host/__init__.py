"""This host: what the launcher left in the environment, secrets that stay out of logs, command lines. No torch."""
