"""The machine and the process: devices, threads, several processes, files, Git, progress."""
