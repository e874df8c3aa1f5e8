"""Pure parts, and effects with a peer or a clock of ours."""
