"""What must hold before a move begins: one function a check, one module a subject."""
