"""How integers sit in words: pure tensor functions, no modules, no files."""
