"""Instructions in the machine code, and the times that they predict."""
