// Directories of packages on this device: pushed ones, and those that were copied here by hand.
import DIMStage
import Foundation

/// A directory with a manifest in it.
public struct SliceDirectory: Equatable, Sendable {
    public let url: URL
    /// of all its files
    public let bytes: UInt64
    /// when its manifest came here. Not the directory's own time: that changes with every file that is put beside it.
    public let date: Date

    /// Those in `parent`, newest first.
    public static func all(in parent: URL) -> [SliceDirectory] {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: parent.path)) ?? []
        return names.compactMap { SliceDirectory(parent.appendingPathComponent($0)) }
            .sorted { ($0.date, $0.url.path) > ($1.date, $1.url.path) }
    }

    /// The newest of all places together; nil if there is none.
    public static func newest(in parents: [URL]) -> SliceDirectory? {
        parents.flatMap { all(in: $0) }.max { ($0.date, $0.url.path) < ($1.date, $1.url.path) }
    }

    /// nil without a manifest: it is none, or is still being copied.
    public init?(_ url: URL) {
        guard let manifest = FileIdentity(url.appendingPathComponent(Manifest.fileName)) else { return nil }
        self.url = url
        date = Date(timeIntervalSince1970: Double(manifest.modifiedNs) / 1e9)
        bytes = sizeOfFiles(in: url)
    }
}

/// Bytes of every file below `directory`; one that has two names is counted twice.
public func sizeOfFiles(in directory: URL) -> UInt64 {
    guard let walk = FileManager.default.enumerator(atPath: directory.path) else { return 0 }
    var total: UInt64 = 0
    while let name = walk.nextObject() as? String {
        total += FileIdentity(directory.appendingPathComponent(name))?.bytes ?? 0
    }
    return total
}
