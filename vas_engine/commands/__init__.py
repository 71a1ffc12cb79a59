"""Commands of `vas`: one module each, with `add_parser(subparsers)` that sets `run(args) -> int | None`."""
