"""The rooms behind the five scripts: each file is about one noun, and none of them imports a script."""
