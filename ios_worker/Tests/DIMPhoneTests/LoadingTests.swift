// Loads that are wanted while another is running, and after one that failed.
import Foundation
import Testing

@testable import DIMPhone

@MainActor
private final class Loader {
    var place: URL? = URL(fileURLWithPath: "/a")
    var loaded: [String] = []
    var works = true
    private var waiting: [CheckedContinuation<Void, Never>] = []
    lazy var loading = SliceLoading<String>(
        newest: { [unowned self] in place },
        load: { [unowned self] place, wish in
            loaded.append("\(place?.lastPathComponent ?? "none") \(wish)")
            await withCheckedContinuation { waiting.append($0) }
            return works && place != nil
        })

    /// Lets the load that is running end.
    func finish() async {
        for _ in 0..<100_000 where waiting.isEmpty { await Task.yield() }
        guard !waiting.isEmpty else {
            Issue.record("no load is running")
            return
        }
        waiting.removeFirst().resume()
        for _ in 0..<100 { await Task.yield() }
    }
}

@MainActor @Suite struct SliceLoadingTests {
    @Test func aPushThatEndsDuringALoadIsLoadedAfterIt() async {
        let loader = Loader()
        loader.loading.want("start")
        while loader.loaded.isEmpty { await Task.yield() }
        // two pushes end while the first slice is tested: one load of the newest follows, not two at once
        loader.place = URL(fileURLWithPath: "/b")
        loader.loading.want("push")
        loader.place = URL(fileURLWithPath: "/c")
        loader.loading.want("push")
        for _ in 0..<100 { await Task.yield() }
        #expect(loader.loaded == ["a start"])
        await loader.finish()
        #expect(loader.loaded == ["a start", "c push"])
        await loader.finish()
        #expect(!loader.loading.isRunning)
        #expect(loader.loaded.count == 2)
    }

    @Test func aFailedLoadCanBeTriedAgain() async {
        let loader = Loader()
        loader.works = false
        loader.loading.want("start")
        await loader.finish()
        #expect(loader.loading.hasFailed)
        // coming to the front does not do it all again by itself, minutes each time
        loader.loading.look("front")
        for _ in 0..<100 { await Task.yield() }
        #expect(loader.loaded == ["a start"])
        // the button does
        loader.works = true
        loader.loading.want("again")
        await loader.finish()
        #expect(loader.loaded == ["a start", "a again"])
        #expect(!loader.loading.hasFailed)
    }

    @Test func packagesCopiedMeanwhileAreFoundWhenTheAppComesToTheFront() async {
        let loader = Loader()
        loader.place = nil
        loader.loading.look("front")
        await loader.finish()
        #expect(loader.loaded == ["none front"])
        #expect(!loader.loading.hasFailed)
        loader.loading.look("front")
        for _ in 0..<100 { await Task.yield() }
        #expect(loader.loaded.count == 1)
        loader.place = URL(fileURLWithPath: "/b")
        loader.loading.look("front")
        // while it is loading, the front is no news
        loader.loading.look("front")
        await loader.finish()
        #expect(loader.loaded == ["none front", "b front"])
        for _ in 0..<100 { await Task.yield() }
        #expect(!loader.loading.isRunning)
    }
}
