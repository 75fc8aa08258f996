"""Tests; a package, as other packages install one of this name."""
