// Stub: see Stubs/README.md. Glibc is near enough for most; what differs stands here.
@_exported import Glibc

public let SO_NOSIGPIPE: Int32 = 0x1022
public let TCP_KEEPALIVE: Int32 = 0x10
public let TCP_RXT_CONNDROPTIME: Int32 = 0x80
