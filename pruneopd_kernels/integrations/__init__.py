"""The operators inside other trainers and servers: one module for each, imported only by whoever names it."""
