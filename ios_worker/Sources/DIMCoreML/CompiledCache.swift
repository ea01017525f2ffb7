// Compiled packages, kept in a directory of their own. They outlive an update of the system, as those inside an app do;
// only the figures are of one system.
//
// A compiled package holds the weights again, byte for byte as far as has been seen. Where it does, its file becomes a
// second name of the package's own: the weights are on the device once, after each package and not only after all.
import DIMCrypto
import DIMStage
import Foundation

struct CompiledCache {
    let directory: URL
    private let manifest: Manifest

    /// - Parameter support: the directory that holds caches, of other slices too
    init(_ manifest: Manifest, in support: URL) {
        self.manifest = manifest
        let identity = manifest.packages.flatMap { $0.files.map(\.sha256) }
        let key = hex(SystemPrimitives.sha256(Array(identity.joined().utf8)).prefix(8))
        directory = support.appendingPathComponent("compiled-\(key)")
    }

    /// The compiled packages of `source`, made with `compile` where they are not there yet.
    /// - Parameters:
    ///   - compile: takes a package, gives a directory that is this function's to keep
    ///   - exclude: keeps a directory out of backups
    ///   - report: called with each package that is compiled
    func packages(
        of source: URL, compile: (URL) async throws -> URL, exclude: (URL) -> Void = { excludeFromBackup($0) },
        report: (Int) -> Void
    ) async throws -> [URL] {
        try FileManager.default.createDirectory(at: directory, withIntermediateDirectories: true)
        exclude(directory)
        dropOthers()
        var compiled: [URL] = []
        for index in manifest.packages.indices {
            let target = directory.appendingPathComponent("\(index).mlmodelc")
            if !FileManager.default.fileExists(atPath: target.path) {
                report(index)
                let package = source.appendingPathComponent(Manifest.packageName(index))
                let temporary = try await compile(package)
                share(package.appendingPathComponent(Manifest.packageWeights), index, with: temporary)
                // under its final name it is whole
                try FileManager.default.moveItem(at: temporary, to: target)
            }
            compiled.append(target)
        }
        return compiled
    }

    /// Makes the compiled copy of the weights another name of `weights`, if it is the same bytes.
    private func share(_ weights: URL, _ index: Int, with compiled: URL) {
        guard let listed = manifest.packages[index].files.first(where: { $0.path == Manifest.packageWeights }),
            let walk = FileManager.default.enumerator(atPath: compiled.path)
        else { return }
        while let name = walk.nextObject() as? String {
            let copy = compiled.appendingPathComponent(name)
            guard FileIdentity(copy)?.bytes == listed.bytes, sha256(of: copy).map({ hex($0) }) == listed.sha256 else {
                continue
            }
            let link = copy.deletingLastPathComponent().appendingPathComponent(".link")
            // without it the weights are there twice: no failure
            guard (try? FileManager.default.linkItem(at: weights, to: link)) != nil else { return }
            if rename(link.path, copy.path) != 0 { try? FileManager.default.removeItem(at: link) }
        }
    }

    /// Compiled packages of other slices are as large as the packages themselves.
    private func dropOthers() {
        let parent = directory.deletingLastPathComponent()
        for name in (try? FileManager.default.contentsOfDirectory(atPath: parent.path)) ?? []
        where name.hasPrefix("compiled-") && name != directory.lastPathComponent {
            try? FileManager.default.removeItem(at: parent.appendingPathComponent(name))
        }
    }
}
