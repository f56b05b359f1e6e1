"""The kernel objects of this host: observe them, converge them to the desired state, watch them for changes."""
