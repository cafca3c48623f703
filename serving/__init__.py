"""What our services and their clients share over HTTP; nothing of what is asked or answered."""
