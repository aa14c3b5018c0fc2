"""The activation cache: what the frozen blocks gave for an example, kept encrypted so that it is computed once."""
