"""Episodes -> clips. Every clip and episode that is not taken leaves a row with a named reason."""
