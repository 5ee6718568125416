"""Writers for other tools: each layer rewritten exactly, so that the tool reads the same delta; one module a tool."""
