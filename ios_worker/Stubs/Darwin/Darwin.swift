// Stub: see Stubs/README.md. Glibc is near enough for most; what differs stands here.
@_exported import Glibc

public let SO_NOSIGPIPE: Int32 = 0x1022
public let TCP_KEEPALIVE: Int32 = 0x10
public let TCP_RXT_CONNDROPTIME: Int32 = 0x80

public typealias natural_t = UInt32
public typealias integer_t = Int32
public typealias kern_return_t = Int32
public typealias mach_port_t = UInt32
public typealias mach_msg_type_number_t = UInt32
public typealias task_flavor_t = UInt32
public typealias task_info_t = UnsafeMutablePointer<integer_t>
public let KERN_SUCCESS: kern_return_t = 0
public let TASK_VM_INFO: Int32 = 22
public let mach_task_self_: mach_port_t = 0

public struct task_vm_info_data_t {
    public init() {}
    public var phys_footprint: UInt64 = 0
}

public func task_info(
    _ task: mach_port_t, _ flavor: task_flavor_t, _ info: task_info_t?,
    _ count: UnsafeMutablePointer<mach_msg_type_number_t>?
) -> kern_return_t { 0 }

extension stat {
    public var st_mtimespec: timespec { st_mtim }
}
