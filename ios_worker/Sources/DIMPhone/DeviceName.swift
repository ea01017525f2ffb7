// What hosts call this device. Since iOS 16 an app is told "iPhone" whatever the owner calls it, so all phones would have
// one name: the model's name is better, and the owner's own best.
import DIMWire
import Foundation

#if canImport(Darwin)
    import Darwin
#else
    import Glibc
#endif

public enum DeviceName {
    /// - Parameters:
    ///   - chosen: what the owner typed, if anything
    ///   - system: what the system calls the device
    ///   - machine: its model, "iPhone14,2"
    public static func best(chosen: String?, system: String, machine: String) -> String {
        if let chosen = chosen.map(cleaned), !chosen.isEmpty { return chosen }
        guard ["iPhone", "iPad", "iPod touch", ""].contains(system) else { return cleaned(system) }
        if let model = models[machine] { return model }
        return machine.hasPrefix("iP") ? "\(system.isEmpty ? "iPhone" : system) (\(machine))" : "iPhone"
    }

    /// The model of the device that this runs on.
    public static func machine() -> String {
        // the simulator says what it pretends to be
        if let simulated = ProcessInfo.processInfo.environment["SIMULATOR_MODEL_IDENTIFIER"] { return simulated }
        var names = utsname()
        guard uname(&names) == 0 else { return "" }
        return withUnsafeBytes(of: names.machine) { bytes in
            String(decoding: bytes.prefix { $0 != 0 }, as: UTF8.self)
        }
    }

    /// One line that the protocol can carry.
    public static func cleaned(_ name: String) -> String {
        let line = shown(name.trimmingCharacters(in: .whitespacesAndNewlines))
        var kept = ""
        for character in line where kept.utf8.count + character.utf8.count <= Limit.name { kept.append(character) }
        return kept
    }

    // From the lists of models that are public; one that is not here is called by its number.
    private static let models = [
        "iPhone13,1": "iPhone 12 mini", "iPhone13,2": "iPhone 12", "iPhone13,3": "iPhone 12 Pro",
        "iPhone13,4": "iPhone 12 Pro Max", "iPhone14,4": "iPhone 13 mini", "iPhone14,5": "iPhone 13",
        "iPhone14,2": "iPhone 13 Pro", "iPhone14,3": "iPhone 13 Pro Max", "iPhone14,6": "iPhone SE (3rd generation)",
        "iPhone14,7": "iPhone 14", "iPhone14,8": "iPhone 14 Plus", "iPhone15,2": "iPhone 14 Pro",
        "iPhone15,3": "iPhone 14 Pro Max", "iPhone15,4": "iPhone 15", "iPhone15,5": "iPhone 15 Plus",
        "iPhone16,1": "iPhone 15 Pro", "iPhone16,2": "iPhone 15 Pro Max", "iPhone17,3": "iPhone 16",
        "iPhone17,4": "iPhone 16 Plus", "iPhone17,1": "iPhone 16 Pro", "iPhone17,2": "iPhone 16 Pro Max",
        "iPhone17,5": "iPhone 16e", "iPhone18,3": "iPhone 17", "iPhone18,1": "iPhone 17 Pro",
        "iPhone18,2": "iPhone 17 Pro Max", "iPhone18,4": "iPhone Air",
    ]
}
