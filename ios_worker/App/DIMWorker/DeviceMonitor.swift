// Temperature, battery and memory, read where the system offers them and kept for the server's threads, which ask before
// every step.
import DIMCoreML
import DIMServer
import DIMWire
import Foundation
import UIKit

final class DeviceMonitor: @unchecked Sendable {
    private let lock = NSLock()
    private var current = DeviceState()
    private var task: Task<Void, Never>?

    var state: DeviceState { lock.withLock { current } }

    @MainActor
    func start() {
        UIDevice.current.isBatteryMonitoringEnabled = true
        task?.cancel()
        task = Task { @MainActor [weak self] in
            while !Task.isCancelled {
                guard let self else { return }
                let fresh = DeviceMonitor.read()
                lock.withLock { current = fresh }
                try? await Task.sleep(for: .seconds(1))
            }
        }
    }

    @MainActor
    private static func read() -> DeviceState {
        var state = DeviceState()
        state.temperature =
            switch ProcessInfo.processInfo.thermalState {
            case .nominal: .nominal
            case .fair: .fair
            case .serious: .serious
            case .critical: .critical
            @unknown default: .unknown
            }
        let battery = UIDevice.current.batteryLevel
        state.battery = battery < 0 ? nil : UInt8(min(100, battery * 100))
        state.memory = Headroom.bytes()
        state.memoryLimit = Headroom.limit()
        return state
    }
}
