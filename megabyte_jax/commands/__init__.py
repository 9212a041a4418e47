"""Holds one file a command and what all commands share; nothing else imports this room."""
