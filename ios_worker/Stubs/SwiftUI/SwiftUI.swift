// Stub: see Stubs/README.md
@_exported import Foundation
@_exported import Observation
import UIKit

// MARK: views

@MainActor @preconcurrency
public protocol View {
    associatedtype Body: View
    @ViewBuilder @MainActor @preconcurrency var body: Body { get }
}

extension Never: View {
    public var body: Never { stub() }
}

/// Stands for every view without a body of its own.
public protocol PrimitiveView: View where Body == Never {}
extension PrimitiveView {
    public var body: Never { stub() }
}

public struct EmptyView: PrimitiveView {
    nonisolated public init() {}
}
public struct TupleView<each Content: View>: PrimitiveView {}
public enum ConditionalView<First: View, Second: View>: PrimitiveView {
    case first(First)
    case second(Second)
}
extension Optional: View where Wrapped: View {
    public var body: Never { stub() }
}

@resultBuilder
public struct ViewBuilder {
    public static func buildBlock() -> EmptyView { EmptyView() }
    public static func buildBlock<Content: View>(_ content: Content) -> Content { content }
    public static func buildBlock<each Content: View>(_ content: repeat each Content) -> TupleView<repeat each Content>
    {
        stub()
    }
    public static func buildExpression<Content: View>(_ content: Content) -> Content { content }
    public static func buildIf<Content: View>(_ content: Content?) -> Content? { content }
    public static func buildEither<F: View, S: View>(first: F) -> ConditionalView<F, S> { .first(first) }
    public static func buildEither<F: View, S: View>(second: S) -> ConditionalView<F, S> { .second(second) }
}

public struct Text: PrimitiveView {
    public struct DateStyle: Sendable {
        public static let timer = DateStyle()
        public static let date = DateStyle()
    }
    public init<S: StringProtocol>(_ content: S) {}
    public init(_ date: Date, style: DateStyle) {}
}

public struct Label<Title: View, Icon: View>: PrimitiveView {}
extension Label where Title == Text, Icon == Image {
    public init<S: StringProtocol>(_ title: S, systemImage: String) {}
}

public struct Image: PrimitiveView {}

public struct TextField<Title: View>: PrimitiveView {}
extension TextField where Title == Text {
    public init<S: StringProtocol>(_ title: S, text: Binding<String>) {}
}

public struct List<Content: View>: PrimitiveView {
    public init(@ViewBuilder content: () -> Content) {}
}

public struct Section<Parent: View, Content: View, Footer: View>: PrimitiveView {}
extension Section where Parent == Text, Footer == EmptyView {
    public init<S: StringProtocol>(_ title: S, @ViewBuilder content: () -> Content) {}
}
extension Section where Parent == EmptyView, Footer == EmptyView {
    public init(@ViewBuilder content: () -> Content) {}
}
extension Section where Parent == EmptyView {
    public init(@ViewBuilder content: () -> Content, @ViewBuilder footer: () -> Footer) {}
}

public struct LabeledContent<Name: View, Content: View>: PrimitiveView {}
extension LabeledContent where Name == Text, Content == Text {
    public init<S: StringProtocol, V: StringProtocol>(_ title: S, value: V) {}
}
extension LabeledContent where Name == Text {
    public init<S: StringProtocol>(_ title: S, @ViewBuilder content: () -> Content) {}
}

public struct ForEach<Items: RandomAccessCollection, ID: Hashable, Content: View>: PrimitiveView {
    public init(
        _ data: Items, id: KeyPath<Items.Element, ID>, @ViewBuilder content: @escaping (Items.Element) -> Content
    ) {}
}
extension ForEach where Items.Element: Identifiable, ID == Items.Element.ID {
    public init(_ data: Items, @ViewBuilder content: @escaping (Items.Element) -> Content) {}
}

public struct ProgressView<Name: View>: PrimitiveView {}
extension ProgressView where Name == Text {
    public init<S: StringProtocol, V: BinaryFloatingPoint>(_ title: S, value: V?, total: V = 1.0) {}
}

public struct ButtonRole: Sendable {
    public static let destructive = ButtonRole()
}

public struct Button<Name: View>: PrimitiveView {}
extension Button where Name == Text {
    public init<S: StringProtocol>(_ title: S, role: ButtonRole?, action: @escaping @MainActor () -> Void) {}
    public init<S: StringProtocol>(_ title: S, action: @escaping @MainActor () -> Void) {}
}

public struct VStack<Content: View>: PrimitiveView {
    public init(spacing: CGFloat? = nil, @ViewBuilder content: () -> Content) {}
}

public struct NavigationStack<Content: View>: PrimitiveView {
    public init(@ViewBuilder root: () -> Content) {}
}

// MARK: modifiers

public struct Font: Sendable {
    public enum TextStyle: Sendable { case title3, footnote, body }
    public enum Design: Sendable { case monospaced }
    public static let footnote = Font()
    public static func system(_ style: TextStyle, design: Design? = nil) -> Font { Font() }
}

public struct EnabledTextSelectability: Sendable {
    public static let enabled = EnabledTextSelectability()
}

extension View {
    public func font(_ font: Font?) -> some View { self }
    public func textSelection(_ selectability: EnabledTextSelectability) -> some View { self }
    public func navigationTitle<S: StringProtocol>(_ title: S) -> some View { self }
    public func onSubmit(_ action: @escaping () -> Void) -> some View { self }
    public func frame(maxWidth: CGFloat?) -> some View { self }
}

// MARK: app

@MainActor @preconcurrency
public protocol Scene {
    associatedtype Body: Scene
    @SceneBuilder @MainActor @preconcurrency var body: Body { get }
}
extension Never: Scene {}

@resultBuilder
public struct SceneBuilder {
    public static func buildBlock<Content: Scene>(_ content: Content) -> Content { content }
}

public struct WindowGroup<Content: View>: Scene {
    public init(@ViewBuilder content: () -> Content) {}
    public var body: Never { stub() }
}

extension Scene {
    public func onChange<V: Equatable>(of value: V, initial: Bool = false, _ action: @escaping (V, V) -> Void) -> some Scene { self }
}

@MainActor @preconcurrency
public protocol App {
    associatedtype Body: Scene
    @SceneBuilder @MainActor @preconcurrency var body: Body { get }
    @MainActor @preconcurrency init()
}
extension App {
    @MainActor public static func main() {}
}

public enum ScenePhase: Comparable, Sendable {
    case background, inactive, active
}

public struct EnvironmentValues {
    public var scenePhase: ScenePhase { stub() }
}

@propertyWrapper
public struct Environment<Value> {
    public init(_ keyPath: KeyPath<EnvironmentValues, Value>) {}
    public var wrappedValue: Value { stub() }
}

public struct Binding<Value> {}

@propertyWrapper
public struct State<Value> {
    public var projectedValue: Binding<Value> { stub() }
    public init(wrappedValue: Value) {}
    public var wrappedValue: Value {
        get { stub() }
        nonmutating set {}
    }
}

private func stub() -> Never { fatalError("a stub") }
