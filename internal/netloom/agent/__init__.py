"""What runs on a host: the agent. It alone has privileges, writes state files and changes the kernel."""
