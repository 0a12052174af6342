"""The shipped demo model: coloured shapes, their prompts, a codec, a text encoding, and the script that trains it."""
