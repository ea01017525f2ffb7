// Stub: see Stubs/README.md
public func os_proc_available_memory() -> Int { 0 }
