"""Very many prompts: read from lists and files, run within a window, written so that a killed run goes on."""
