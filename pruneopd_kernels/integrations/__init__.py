"""The operators inside other trainers and servers: one module for each, imported only on request."""
