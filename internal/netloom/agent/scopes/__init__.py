"""The scopes of this host: their state files, the calls that change them, and the work that no call asks for."""
