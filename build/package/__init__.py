"""What `make release` writes into dist/, made from dist/netloom and this repository."""
