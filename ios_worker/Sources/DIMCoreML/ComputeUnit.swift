// Where Core ML may run a package.

public enum ComputeUnit: String, CaseIterable, Sendable {
    case cpu
    case gpu
    case ane

    /// How a screen calls it.
    public var title: String {
        switch self {
        case .cpu: "CPU"
        case .gpu: "GPU"
        case .ane: "Neural Engine"
        }
    }
}
