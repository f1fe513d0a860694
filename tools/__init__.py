"""Scripts of this project: the demo, and broken repositories for the tests. No part of the installed package."""
