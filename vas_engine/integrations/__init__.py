"""Value-augmented sampling inside other stacks; one module a host, each imported by itself."""
