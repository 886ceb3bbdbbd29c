"""What a run did: its records read back, drawn and written as one HTML file."""
