"""How an operator looks at a running daemon and steers it."""
