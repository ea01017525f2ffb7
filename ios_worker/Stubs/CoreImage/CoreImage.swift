// Stub: see Stubs/README.md
@_exported import Foundation

public final class CGImage: Sendable {}

open class CIImage {
    public var extent: CGRect { stub() }
}

open class CIFilter {
    public init?(name: String) { stub() }
    public func setValue(_ value: Any?, forKey key: String) { stub() }
    public var outputImage: CIImage? { stub() }
}

open class CIContext {
    public init() {}
    public func createCGImage(_ image: CIImage, from rect: CGRect) -> CGImage? { stub() }
}

private func stub() -> Never { fatalError("a stub") }
