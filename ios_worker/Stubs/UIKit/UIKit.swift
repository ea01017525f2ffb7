// Stub: see Stubs/README.md
@_exported import CoreImage
@_exported import Foundation

@MainActor
open class UIApplication {
    public class var shared: UIApplication { stub() }
    public var isIdleTimerDisabled = false
    public nonisolated static let didReceiveMemoryWarningNotification = NSNotification.Name("")
}

@MainActor
open class UIDevice {
    public class var current: UIDevice { stub() }
    public var name: String { stub() }
    public var isBatteryMonitoringEnabled = false
    public var batteryLevel: Float { stub() }
}

open class UIImage: @unchecked Sendable {
    public init(cgImage: CGImage) { stub() }
}

extension ProcessInfo {
    /// Foundation has it on Apple systems only.
    public enum ThermalState: Int, Sendable {
        case nominal, fair, serious, critical
    }

    public var thermalState: ThermalState { stub() }
}

private func stub() -> Never { fatalError("a stub") }
