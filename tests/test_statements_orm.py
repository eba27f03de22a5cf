"""What SQLAlchemy and Django really send, captured in psycopg while they talk to a real server, planned and decided.

The applications keep to one tenant at a time, as those of a sharded database do: none of their statements may be
refused, and each that touches a split table has to go to the shard of the tenant it is about.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
from psycopg import _cursor_base

from router.statements import Action, Arguments, Decision, Plans, Tables, decide
from shardmove.domain.keys import KeyRange, KeyType
from shardmove.domain.moves import Keyspace, Scheme, TableName
from shardmove.domain.routes import Route, Routes, RouteTable
from tests.support.servers import Databases

TENANT = 150
SPLIT = ("customer", "purchase", "item")


@dataclass
class View:
    tables: Tables
    routes: RouteTable
    home: str = "home"
    shards: tuple[str, ...] = ("home", "away")


def view_of(prefix: str, reference: str) -> View:
    """Tenants from 100 on are away."""
    keyspace = Keyspace(
        "tenants",
        KeyType.BIGINT,
        Scheme.RANGE,
        {TableName("public", prefix + name): "tenant_id" for name in SPLIT},
        (TableName("public", reference),),
    )
    routes = Routes.of("tenants", [Route(KeyRange(None, 100), "home"), Route(KeyRange(100, None), "away")])
    return View(Tables({"tenants": keyspace}), RouteTable(1, {"tenants": routes}))


@dataclass
class Sent:
    text: bytes
    arguments: Arguments


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Sent]:
    """Every statement that psycopg sends, with its parameters as they go over the wire."""
    statements: list[Sent] = []
    original = _cursor_base.BaseCursor._maybe_prepare_gen

    def noting(self: Any, pgq: Any, **options: Any) -> Any:
        values = [None if value is None else bytes(value) for value in pgq.params or ()]
        statements.append(
            Sent(bytes(pgq.query), Arguments([int(f) for f in pgq.formats or ()], values, list(pgq.types or ())))
        )
        return original(self, pgq, **options)

    monkeypatch.setattr(_cursor_base.BaseCursor, "_maybe_prepare_gen", noting)
    return statements


@pytest.fixture
def dsn(servers: Any) -> Iterator[str]:
    databases = Databases(servers)
    yield databases("s1")["s1"]
    databases.drop()


def decided(sent: list[Sent], view: View) -> list[tuple[Sent, Decision]]:
    plans = Plans(view.tables)
    return [(one, decide(plans.of(one.text), one.arguments, view)) for one in sent]


def assert_right(found: list[tuple[Sent, Decision]], prefix: str) -> None:
    """Statements of split tables go away, all others do not; none is refused."""
    names = re.compile(rb'(?:FROM|JOIN|INTO|UPDATE) "?(?:%s)\b' % "|".join(prefix + name for name in SPLIT).encode())
    for one, decision in found:
        assert decision.refusal is None, (one.text, decision.refusal)
        if names.search(one.text) and decision.action is not Action.DDL:
            assert decision.shards == ("away",), (one.text, one.arguments, decision.shards)
        assert decision.action is not Action.SCATTER, one.text


def kinds(found: list[tuple[Sent, Decision]]) -> set[Action]:
    return {decision.action for _, decision in found}


def test_sqlalchemy(dsn: str, sent: list[Sent]) -> None:
    sqlalchemy_application(dsn)
    found = decided(sent, view_of("", "country"))
    assert len(found) > 40
    assert_right(found, "")
    assert {Action.KEYED, Action.DDL, Action.REFERENCE_READ} <= kinds(found)


def sqlalchemy_application(dsn: str) -> None:
    import sqlalchemy as sa
    from sqlalchemy import orm

    class Base(orm.DeclarativeBase):
        pass

    def key(*options: Any) -> Any:
        return orm.mapped_column(sa.BigInteger, *options, primary_key=True)

    class Country(Base):
        __tablename__ = "country"
        id = orm.mapped_column(sa.Integer, primary_key=True)
        name = orm.mapped_column(sa.Text)

    class Customer(Base):
        __tablename__ = "customer"
        tenant_id, id = key(), key(sa.Identity())
        name = orm.mapped_column(sa.String(50))
        country_id = orm.mapped_column(sa.Integer)
        purchases = orm.relationship("Purchase", back_populates="customer")

    class Purchase(Base):
        __tablename__ = "purchase"
        tenant_id, id = key(), key(sa.Identity())
        customer_id = orm.mapped_column(sa.BigInteger)
        total = orm.mapped_column(sa.Integer)
        __table_args__ = (sa.ForeignKeyConstraint(["tenant_id", "customer_id"], ["customer.tenant_id", "customer.id"]),)
        customer = orm.relationship("Customer", back_populates="purchases")

    engine = sa.create_engine(dsn_url(dsn))
    Base.metadata.create_all(engine)
    mine = Customer.tenant_id == TENANT
    with orm.Session(engine) as session:
        session.execute(sa.select(Country)).all()
        people = [Customer(tenant_id=TENANT, name=f"c{n}") for n in range(30)]
        session.add_all(people)  # insertmanyvalues with RETURNING
        session.flush()
        for person in people[:5]:
            session.add(Purchase(tenant_id=TENANT, customer_id=person.id, total=3))
        session.commit()
        first = session.get(Customer, (TENANT, people[0].id))
        assert first is not None
        first.name = "changed"
        session.flush()
        assert len(first.purchases) == 1  # lazy load
        session.expire_all()
        loads: list[Callable[..., Any]] = [orm.joinedload, orm.selectinload, orm.subqueryload]
        for load in loads:
            session.scalars(
                sa.select(Customer).where(mine).options(load(Customer.purchases)).order_by(Customer.id)
            ).unique().all()
            session.expire_all()
        session.scalars(
            sa.select(Purchase).where(Purchase.tenant_id == TENANT).options(orm.joinedload(Purchase.customer))
        ).all()
        session.execute(
            sa.select(Customer.name, sa.func.count(Purchase.id))
            .join(Purchase)
            .where(mine)
            .group_by(Customer.name)
            .limit(5)
        ).all()
        session.execute(sa.select(Customer).where(mine, Customer.purchases.any(Purchase.total > 1))).all()
        session.execute(sa.select(Customer).where(mine, Customer.id.in_([1, 2, 3]), Customer.name.like("c%"))).all()
        session.execute(sa.select(Customer).where(mine, Customer.id.in_([]))).all()
        session.execute(sa.select(sa.func.count()).select_from(sa.select(Customer).where(mine).subquery())).all()
        session.execute(sa.select(sa.exists().where(mine))).all()
        session.execute(sa.select(Customer).where(mine).with_for_update(skip_locked=True)).all()
        session.execute(
            sa.update(Customer).where(mine, Customer.name == "c3").values(name="c4").returning(Customer.id)
        ).all()
        session.execute(
            sa.insert(Customer).returning(Customer.id), [{"tenant_id": TENANT, "name": f"b{n}"} for n in range(3)]
        ).all()
        with session.begin_nested():
            session.add(Purchase(tenant_id=TENANT, customer_id=first.id, total=9))
        core_statements(session, sa, Customer, Purchase)
        session.delete(session.scalars(sa.select(Purchase).where(Purchase.tenant_id == TENANT).limit(1)).one())
        session.execute(sa.delete(Purchase).where(Purchase.tenant_id == TENANT))
        session.commit()
    Base.metadata.drop_all(engine)
    engine.dispose()


def core_statements(session: Any, sa: Any, customer: Any, purchase: Any) -> None:
    from sqlalchemy.dialects.postgresql import insert

    row = {"tenant_id": TENANT, "id": 1, "name": "again"}
    upsert = insert(customer).values(**row)
    session.execute(
        upsert.on_conflict_do_update(index_elements=["tenant_id", "id"], set_={"name": upsert.excluded.name})
    )
    session.execute(insert(customer).values([row, {**row, "id": 2}]).on_conflict_do_nothing())
    recent = sa.select(customer).where(customer.tenant_id == TENANT).cte("recent")
    session.execute(
        sa.select(recent.c.id, purchase.total).join(
            purchase, sa.and_(purchase.tenant_id == recent.c.tenant_id, purchase.customer_id == recent.c.id)
        )
    ).all()
    ranked = (
        sa.select(purchase.total, sa.func.row_number().over(partition_by=purchase.customer_id).label("n"))
        .where(purchase.tenant_id == TENANT)
        .subquery()
    )
    session.execute(sa.select(ranked).where(ranked.c.n == 1)).all()
    session.execute(
        sa.update(purchase)
        .values(total=0)
        .where(
            purchase.tenant_id == customer.tenant_id, customer.tenant_id == TENANT, purchase.customer_id == customer.id
        )
    )
    one = sa.select(customer.id).where(customer.tenant_id == TENANT)
    session.execute(one.union_all(sa.select(purchase.id).where(purchase.tenant_id == TENANT))).all()


def dsn_url(dsn: str) -> str:
    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    host = str(parts.get("host", ""))
    where = f"?host={host}&port={parts.get('port')}" if host.startswith("/") else ""
    place = "" if where else f"{host}:{parts.get('port')}"
    return f"postgresql+psycopg://{parts.get('user')}@{place}/{parts.get('dbname')}{where}"


def test_django(dsn: str, sent: list[Sent], tmp_path: Path) -> None:
    django_application(dsn, tmp_path)
    found = decided(sent, view_of("shop_", "shop_country"))
    assert len(found) > 60
    assert_right(found, "shop_")
    assert {Action.KEYED, Action.DDL, Action.HOME, Action.SET} <= kinds(found)


def django_application(dsn: str, directory: Path) -> None:
    import django
    from django.conf import settings
    from django.core.management import call_command
    from django.db import connection

    parts = psycopg.conninfo.conninfo_to_dict(dsn)
    app = ModuleType("shop")
    app.__path__ = [str(directory)]
    sys.modules["shop"] = app
    settings.configure(
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "shop"],
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        USE_TZ=True,
        TIME_ZONE="UTC",
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": parts["dbname"],
                "USER": parts["user"],
                "PASSWORD": parts.get("password", ""),
                "HOST": parts["host"],
                "PORT": parts.get("port", ""),
                "TIME_ZONE": "Europe/Berlin",
            }
        },
    )
    django.setup()
    models = django_models()
    call_command("migrate", verbosity=0)
    with connection.schema_editor() as editor:
        for model in models:
            editor.create_model(model)
    try:
        for server_side in (False, True):
            connection.close()
            connection.settings_dict["OPTIONS"] = {"server_side_binding": server_side}
            django_queries(*models)
    finally:
        connection.close()


def django_models() -> tuple[Any, ...]:
    from django.db import models

    class Country(models.Model):
        name = models.TextField()

        class Meta:
            app_label = "shop"

    class Customer(models.Model):
        pk = models.CompositePrimaryKey("tenant_id", "id")
        tenant_id = models.BigIntegerField()
        id = models.BigIntegerField()
        name = models.TextField()

        class Meta:
            app_label = "shop"

    class Purchase(models.Model):
        pk = models.CompositePrimaryKey("tenant_id", "id")
        tenant_id = models.BigIntegerField()
        id = models.BigIntegerField()
        customer_id = models.BigIntegerField()
        customer = models.ForeignObject(
            Customer,
            models.DO_NOTHING,
            from_fields=("tenant_id", "customer_id"),
            to_fields=("tenant_id", "id"),
            related_name="purchases",
        )
        country = models.ForeignKey(Country, models.DO_NOTHING, null=True)
        total = models.IntegerField(default=0)

        class Meta:
            app_label = "shop"

    return Country, Customer, Purchase


def django_queries(country: Any, customer: Any, purchase: Any) -> None:
    from django.db import transaction
    from django.db.models import Count, Exists, F, OuterRef, Q, Sum

    mine, theirs = customer.objects.filter(tenant_id=TENANT), purchase.objects.filter(tenant_id=TENANT)
    list(country.objects.all())
    with transaction.atomic():
        customer.objects.create(tenant_id=TENANT, id=1, name="one")
        customer.objects.bulk_create([customer(tenant_id=TENANT, id=n, name="n") for n in range(2, 12)])
        purchase.objects.bulk_create(
            [purchase(tenant_id=TENANT, id=n, customer_id=n) for n in range(1, 8)], ignore_conflicts=True
        )
        with transaction.atomic():
            purchase(tenant_id=TENANT, id=20, customer_id=1, total=2).save(force_insert=True)
    one = customer.objects.get(pk=(TENANT, 1))
    one.name = "two"
    one.save()
    one.save(update_fields=["name"])
    one.refresh_from_db()
    mine.get_or_create(tenant_id=TENANT, id=1, defaults={"name": "x"})
    mine.update_or_create(tenant_id=TENANT, id=30, defaults={"name": "x"})
    people = list(mine.filter(id__in=[1, 2, 3]).order_by("-id"))
    for person in people:
        person.name += "!"
    customer.objects.bulk_update(people, ["name"])
    customer.objects.bulk_create(
        people, update_conflicts=True, unique_fields=["tenant_id", "id"], update_fields=["name"]
    )
    list(theirs.select_related("customer", "country"))
    list(mine.prefetch_related("purchases"))
    list(one.purchases.all())
    list(mine.annotate(n=Count("purchases")).filter(n__gt=0))
    list(mine.filter(purchases__total__gt=1).distinct())
    list(mine.exclude(name="x").values_list("name", flat=True)[:5])
    list(mine.filter(Q(id=1) | Q(name="n"))[2:4])
    list(mine.filter(id__in=theirs.values("customer_id")))
    list(mine.filter(Exists(purchase.objects.filter(tenant_id=OuterRef("tenant_id"), customer_id=OuterRef("id")))))
    theirs.aggregate(Sum("total"))
    mine.count()
    mine.exists()
    theirs.update(total=F("total") + 1)
    with transaction.atomic():
        list(mine.select_for_update().filter(id=1))
    list(mine.union(customer.objects.filter(tenant_id=TENANT, id=4)))
    theirs.filter(id=3).delete()
    theirs.delete()
    mine.delete()
