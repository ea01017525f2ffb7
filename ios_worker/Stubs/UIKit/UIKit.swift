// Stub: see Stubs/README.md
@_exported import Foundation

@MainActor
open class UIApplication {
    public class var shared: UIApplication { stub() }
    public var isIdleTimerDisabled = false
    public func beginBackgroundTask(
        withName name: String?, expirationHandler: (@MainActor @Sendable () -> Void)?
    ) -> UIBackgroundTaskIdentifier { stub() }
    public func endBackgroundTask(_ identifier: UIBackgroundTaskIdentifier) {}
    public nonisolated static let didReceiveMemoryWarningNotification = NSNotification.Name("")
}

@MainActor
open class UIDevice {
    public class var current: UIDevice { stub() }
    public var name: String { stub() }
    public var isBatteryMonitoringEnabled = false
    public var batteryLevel: Float { stub() }
}

public struct UIBackgroundTaskIdentifier: Hashable, Sendable {
    public static let invalid = UIBackgroundTaskIdentifier()
}

@MainActor
open class UIPasteboard {
    public class var general: UIPasteboard { stub() }
    public var string: String?
}

extension ProcessInfo {
    /// Foundation has it on Apple systems only.
    public enum ThermalState: Int, Sendable {
        case nominal, fair, serious, critical
    }

    public var thermalState: ThermalState { stub() }
}

private func stub() -> Never { fatalError("a stub") }
