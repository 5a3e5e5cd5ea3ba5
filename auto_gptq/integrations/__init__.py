"""Working together with other libraries, each imported only when touched."""
