"""``make bench-gpu``: is the step right, and what does it cost, on the GPU that is here."""
